"""How far a number may be from the expected one, and how much of that each test uses.

`python -m pytest --tolerances 0.25` ends with the tests that use more than a quarter of it.
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
    USED[test] = max(USED.get(test, (0, "")), (share, what.partition("\n")[0]))
    assert share <= 1, (f"{what}: differs by {error.flat[worst]:.2e}, "
                        f"allowed {allowed.flat[worst]:.2e}")


def assert_allclose(ours, theirs, rtol=1e-7, atol=0, what="result"):
    """NumPy's check of finite arrays, recorded: |ours - theirs| <= atol + rtol * |theirs|."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape or theirs.ndim == 0, (what, ours.shape, theirs.shape)
    within(abs(ours - theirs), atol + rtol * abs(theirs), what)


def assert_same_pixels(ours, theirs, most=1, what="picture"):
    """Pictures of whole numbers: no pixel differs by more than `most`, 99 % by 1 at most.

    Equal numbers may be rounded to neighbours, so a difference of 1 uses nothing of the tolerance.
    """
    difference = abs(np.asarray(ours, int) - np.asarray(theirs, int))
    within(max(difference.max() - 1, 0), most - 1, f"{what}, a pixel")
    within((difference > 1).mean(), 0.01, f"{what}, share of pixels")


def report(least):
    """Lines of a table: the tests that use more than `least` of what they allow, the most first.

    More than all of it uses a test that fails, or one that shows how a comparison fails.
    """
    rows = sorted(((*used, test) for test, used in USED.items() if least < used[0] <= 1),
                  reverse=True)
    return [f"{share:6.2f}  {test}  {what}" for share, what, test in rows]


def assert_close(ours, theirs, relative, what=""):
    """The largest difference is below `relative` of the reference's standard deviation."""
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} against {theirs.shape}"
    scale = theirs.std() if theirs.size > 1 else abs(theirs).max()
    error = abs(ours - theirs).max() / (scale + 1e-300)
    within(error, relative, f"{what}, in standard deviations")
    return error
