"""The statistics of diagnoses on known samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn

from metamix_jax.commands.diagnose import statistics


def test_distance_of_a_shift_is_the_shift_whatever_the_order():
    sample = np.random.default_rng(0).normal(size=1001)
    assert statistics.distance(sample, sample[::-1] + 0.25) == pytest.approx(0.25, rel=1e-12)


def test_distance_is_that_of_scipy():
    first, second = np.random.default_rng(0).normal(size=(2, 500)) * [[1.0], [2.0]]
    expected = scipy.stats.wasserstein_distance(first, second)
    assert statistics.distance(first, second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("deviation", "unit"), [(2.0, 2.0), (0.0, 1.0)])
def test_pairwise_distances(deviation, unit):
    sample = np.arange(10.0)
    samples = {8: sample, 4: sample + 1, 2: sample - 2}
    found = statistics.pairwise_distances(samples, deviation)
    expected = {"8-4": 1 / unit, "8-2": 2 / unit, "4-2": 3 / unit, "mean": 2 / unit}
    assert found == pytest.approx(expected)


def test_summary_counts_the_layers_that_came_closer():
    def state(*means):
        return {"full": dict(zip("abcd", ({"mean": mean} for mean in means), strict=True))}

    states = {"before": state(0.0, 1.0, 2.0, 9.0), "after": state(0.0, 0.5, 2.5, 9.0)}
    (row,) = statistics.summarise({"running": states}, ["a", "b", "c"])
    assert row == {"statistics": "running", "weights": "full", "before": 1.0, "after": 1.0,
                   "closer": 1, "layers": 2}  # fmt: skip
    (row,) = statistics.summarise({"running": {"after": states["after"]}}, ["a", "b", "c"])
    assert (row["before"], row["after"], row["closer"]) == (None, 1.0, None)


def test_running_trace_is_batch_norms():
    batches = np.random.default_rng(0).normal(size=(4, 32, 3)) * [1.0, 2.0, 3.0]
    norm = nn.BatchNorm(use_running_average=False, momentum=0.75)
    moved = norm.init(jax.random.key(0), jnp.zeros((1, 3)))
    trace = statistics.running_trace(batches.var(axis=1), 0.75, np.ones(3))
    for step, batch in enumerate(batches):
        _, stats = norm.apply(moved, jnp.float32(batch), mutable=["batch_stats"])
        moved = moved | stats
        np.testing.assert_allclose(moved["batch_stats"]["var"], trace[step], rtol=1e-5)


@pytest.mark.parametrize(("slope", "sign"), [(0.5, 1.0), (-0.5, -1.0)])
def test_trace_of_a_variance_that_is_the_bits(slope, sign):
    drawn = [8, 2, 4, 2, 8, 4]
    variances = {bits: np.full((6, 2), 10 + slope * bits) for bits in (8, 4, 2)}
    found = statistics.trace_summary(variances, drawn, momentum=0.0)
    assert found["correlation_batch"] == pytest.approx(sign)
    assert found["running_variance"] == pytest.approx(found["batch_variance"])
    assert found["batch_variance"] == [10 + slope * bits for bits in drawn]
    values = np.array(found["batch_variance"])
    assert found["variation_batch"] == pytest.approx(values.std() / values.mean())
    assert found["variation_widest"] == 0.0
    assert found["ratio"]["2"] == pytest.approx((10 + 2 * slope) / (10 + 8 * slope))


def test_trace_of_a_variance_that_the_bits_do_not_move():
    variances = {bits: np.ones((6, 2)) for bits in (8, 4, 2)}
    found = statistics.trace_summary(variances, [8, 2, 4, 2, 8, 4], momentum=0.9)
    assert found["correlation_batch"] is None
    assert found["variation_running"] == pytest.approx(0.0, abs=1e-12)


def test_variances_of_a_quantized_gaussian():
    sample = np.random.default_rng(0).standard_normal(1_000_000)
    rows = {row["rule"]: row for row in statistics.quantized_variances(sample)}
    # Two bits, signed, in closed form: step 2 sqrt(2 / pi), levels -1, 0, 1.
    step = 2 * np.sqrt(2 / np.pi)
    ternary = step**2 * 2 * scipy.stats.norm.sf(step / 2)
    expected = {
        # The range depends on the sample's extremes, hence the wide tolerances.
        "min-max: one range for all widths": (
            [1.0002, 1.033, 1.151, 2.491],
            [1e-3, 2e-3, 1e-2, 0.2],
        ),
        "LSQ init, signed": ([1.002, 1.031, 1.063, ternary], [2e-3] * 4),
    }
    for rule, (values, tolerances) in expected.items():
        assert rows[rule]["reference"] == pytest.approx(sample.var(), rel=1e-6)
        found = [value / sample.var() for value in rows[rule]["variance"].values()]
        assert np.all(np.abs(np.subtract(found, values)) < tolerances), (rule, found)
    relu = rows["LSQ init, ReLU, unsigned"]
    ratios = [value / relu["reference"] for value in relu["variance"].values()]
    assert ratios == pytest.approx([1.0005, 1.002, 0.941, 0.724], abs=2e-3)


def test_sensitivity_ranks():
    bits, macs = {"a": 8, "b": 4, "c": 2}, {"a": 10, "b": 20, "c": 40, "fixed": 1}
    found = statistics.sensitivity(bits, macs)
    assert found["spearman"] == {"macs": pytest.approx(-1), "trace": None, "trace_per_mac": None}
    found = statistics.sensitivity(bits, macs, {"a": 1.0, "b": 4.0, "c": 2.0})
    assert found["spearman"]["trace"] == pytest.approx(-0.5)
    assert found["spearman"]["trace_per_mac"] == pytest.approx(0.5)
    assert found["layers"]["b"]["trace_per_mac"] == 0.2
    assert statistics.sensitivity(dict.fromkeys(bits, 4), macs)["spearman"]["macs"] is None
