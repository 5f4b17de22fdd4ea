"""How far a number may be from the expected one, and how much of that each test uses.

`python -m pytest --tolerances` ends with the tests that use more than a quarter of what they allow.
"""
import os

import numpy as np

USED = {}       # test -> (error / allowed, what was compared): its comparison closest to the limit


def within(error, allowed, what="result"):
    """Assert error <= allowed, for every element if they are arrays. A NaN fails."""
    error, allowed = np.broadcast_arrays(np.asarray(error, float), np.asarray(allowed, float))
    if not error.size:
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        used = np.where(error == 0, 0, error / allowed)
    worst = used.argmax()                               # a NaN counts as the largest
    share = float(used.flat[worst])
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    USED[test] = max(USED.get(test, (0, "")), (share, what))
    assert share <= 1, (f"{what}: differs by {error.flat[worst]:.2e}, "
                        f"allowed {allowed.flat[worst]:.2e}")


def assert_allclose(ours, theirs, rtol=1e-7, atol=0, what="result"):
    """NumPy's check of finite arrays, recorded: |ours - theirs| <= atol + rtol * |theirs|."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape or theirs.ndim == 0, (what, ours.shape, theirs.shape)
    within(abs(ours - theirs), atol + rtol * abs(theirs), what)


def report(least=0.25):
    """Lines of a table: the tests that use more than `least` of what they allow, the most first."""
    rows = sorted(((*used, test) for test, used in USED.items() if used[0] > least), reverse=True)
    return [f"{share:6.2f}  {test}  {what}" for share, what, test in rows]
