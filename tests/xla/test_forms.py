"""A form for one compiler keeps the derivative of the plain form."""

import jax
import numpy as np

from gptjax.xla.forms import form_of
from tests.compare import normal


def test_the_forms_numbers_and_the_plain_forms_derivative():
    @form_of(lambda x: x**3)
    def form(x):
        return 7 * x

    x = normal(0, 4)
    np.testing.assert_allclose(form(x), 7 * x)
    np.testing.assert_allclose(jax.grad(lambda x: form(x).sum())(x), 3 * x**2)
