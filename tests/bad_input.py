"""What the tests of wrong input share: an error has a type, and a message that says enough."""

import pytest


def message(error, call, *args, **kwargs):
    """The text of the error that the call raises: `error` itself, not a subclass of it."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert caught.type is error
    return str(caught.value)


def check(error, words, call, *args, **kwargs):
    """The call raises `error`, and its message has each of the words."""
    said = message(error, call, *args, **kwargs)
    assert [word for word in words.split() if word not in said] == [], said
