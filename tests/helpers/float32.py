"""Error bounds of float32 arithmetic, for comparisons of sums taken in different orders."""

import numpy as np

UNIT_ROUNDOFF = np.finfo(np.float32).eps / 2


def sum_error(terms, *, further=4):
    """Returns the relative error bound of a sum of non-negative terms in any order.

    Each of two computations is off by at most (terms - 1) u (Higham, Accuracy and Stability of
    Numerical Algorithms, section 4.2), and by u for each of a few further operations.
    """
    return 2 * (terms - 1 + further) * UNIT_ROUNDOFF
