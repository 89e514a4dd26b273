import os
import subprocess
import sys

import pytest

from metamix_jax import process
from metamix_jax.config import default
from metamix_jax.errors import UserError

# Touches 50 MB of fresh memory again and again, and prints the page faults of the last time.
FAULTS = """
import resource
import numpy
from metamix_jax import process
process.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    before = faults()
    numpy.ones(50_000_000, numpy.uint8)
print(faults() - before)
"""


def page_faults(**environment):
    found = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(found.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_used_again():
    assert page_faults() < 10
    assert page_faults(MALLOC_MMAP_THRESHOLD_="65536") > 20  # the user's own setting counts


def test_memory_is_left_alone_where_there_may_be_an_accelerator(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(process, "_ACCELERATORS", ("jax",))
    assert not process.keep_freed_memory()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    config = default()
    (tmp_path / "file").touch()
    config.compilation_cache = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"config\.compilation_cache=.*Not a directory"):
        process.keep_compiled(config)


def test_the_cache_is_set_where_asked_alone(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(process.jax.config, "update", found.__setitem__)
    process.keep_compiled(None)
    process.keep_compiled(default())
    assert found == {}
    config = default()
    config.compilation_cache = str(tmp_path / "new" / "cache")
    process.keep_compiled(config)
    assert found["jax_compilation_cache_dir"] == config.compilation_cache
    assert (tmp_path / "new" / "cache").is_dir()
