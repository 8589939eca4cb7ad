from gptjax.verify.explain import explain
from gptjax.verify.model import tolerances
from tests.verify.subject import subject as make_subject


def test_every_tensor_has_its_number_of_roundings_and_its_tolerance():
    subject = make_subject(dtype="float32")
    text = explain(subject)
    assert "5.96e-08 in float32" in " ".join(text.split())
    table = {line.split()[0]: line.split()[1:] for line in text.splitlines()[-23:]}
    assert len(table) == 23
    n, tolerance = int(table["fcw"][0].replace(",", "")), float(table["fcw"][1])
    assert abs(tolerance / (4 * n**0.5 * 2**-24) - 1) < 0.05
    assert abs(tolerance / max(block.fcw for block in tolerances(subject).params.blocks) - 1) < 0.05
    assert int(table["wte"][0].replace(",", "")) > n > int(table["lnfw"][0].replace(",", ""))
