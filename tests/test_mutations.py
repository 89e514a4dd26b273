"""The rows of make mutate still apply to the sources."""

import pytest

from tests.mutations import MUTATIONS, ROOT, mutated


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_a_mutation_applies(number):
    mutation = MUTATIONS[number]
    right = (ROOT / mutation.file).read_text()
    wrong = mutated(right, mutation)
    assert wrong != right
    compile(wrong, mutation.file, "exec")
    for name in mutation.tests.split(" -k ")[0].split():
        assert (ROOT / name).is_file(), name


def test_there_are_enough():
    assert len(MUTATIONS) >= 60
    assert len({(m.file, m.old, m.new) for m in MUTATIONS}) == len(MUTATIONS)
