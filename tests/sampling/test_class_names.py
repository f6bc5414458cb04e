"""Which class a name means."""

import pytest

from vgpt_jax.errors import UserError
from vgpt_jax.sampling.class_names import find_class, slug

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
