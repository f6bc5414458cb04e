import pytest

from vgpt_jax.errors import UserError, choose, close_names, exit_on_user_error, listed


def test_close_name_is_suggested():
    assert close_names("emojy", ["emoji", "image_folder", "celeba"]) == "did you mean 'emoji'?"


def test_case_does_not_matter():
    assert close_names("RED HEART", ["red heart", "blue book"]).startswith("did you mean 'red heart'")


def test_one_word_of_a_name_is_enough():
    assert close_names("num_steps", ["gpt.width", "training.num_steps"]) == "did you mean 'training.num_steps'?"
    assert close_names("retriever", ["golden retriever", "pug"]) == "did you mean 'golden retriever'?"


def test_closest_names_come_first_and_are_limited():
    choices = ["batch_size", "batch_sizes", "batch_sise", "batch_si", "seed"]
    assert close_names("batch_size", choices, count=2) == "did you mean 'batch_size' or 'batch_sizes'?"


def test_all_names_are_listed_where_none_is_close():
    assert close_names("zzz", ["dog", "cat"]) == "there are: cat, dog"


def test_long_list_is_cut():
    listed = close_names("zzz", [f"name{i:02d}" for i in range(25)])
    assert listed.endswith("name19 and 5 more")
    assert "name20" not in listed


def test_names_in_a_row():
    assert listed(str(i) for i in range(3)) == "0, 1, 2"
    assert listed("abcd", most=2) == "a, b and 2 more"


def test_choose_looks_up():
    assert choose("data.name", "b", {"a": 1, "b": 2}) == 2


def test_choose_lists_what_there_is():
    with pytest.raises(UserError) as caught:
        choose("data.name", "c", {"b": 2, "a": 1})
    assert str(caught.value) == "data.name is 'c', but must be one of a, b"


def test_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)


def test_user_error_ends_a_command_with_one_line_and_status_two(capsys):
    @exit_on_user_error
    def command():
        raise UserError("data.folder '' is not a folder")

    with pytest.raises(SystemExit) as caught:
        command()
    assert caught.value.code == 2
    written = capsys.readouterr()
    assert written.err == "error: data.folder '' is not a folder\n"
    assert written.out == ""


def test_a_message_is_one_line_whatever_names_are_in_it(capsys):
    @exit_on_user_error
    def command():
        raise UserError("a\nb\r\n is missing")

    with pytest.raises(SystemExit):
        command()
    assert capsys.readouterr().err == "error: a b is missing\n"


def test_other_errors_pass_through():
    @exit_on_user_error
    def command():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command()


def test_arguments_and_result_of_a_command_pass_through():
    assert exit_on_user_error(lambda a, *, b: (a, b))(1, b=2) == (1, 2)
