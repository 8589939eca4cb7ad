import errno

import pytest

from gptjax import errors


def test_every_project_error_is_a_gptjax_error():
    own = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(own) == 5
    assert all(issubclass(e, errors.GptjaxError) for e in own)


def test_naming_adds_the_file_that_the_system_leaves_out():
    with pytest.raises(OSError, match="No space left") as error, errors.naming("a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "a.bin")


def test_naming_keeps_a_file_that_is_named_already():
    with pytest.raises(OSError, match="denied") as error, errors.naming("written.bin"):
        raise OSError(errno.EACCES, "denied", "read.bin")
    assert error.value.filename == "read.bin"


def test_naming_lets_other_errors_pass():
    with pytest.raises(ValueError, match="as it is"), errors.naming("a.bin"):
        raise ValueError("as it is")
