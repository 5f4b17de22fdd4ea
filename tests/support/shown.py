"""What a page or a notebook shows, compared with what its code gives."""
import re

import numpy as np
from PIL import Image

from tests.support.tolerance import assert_allclose, within

NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:e[-+]?\d+)?")


def assert_same_picture(drawn, shown):
    """Matplotlib signs its pictures. Another version draws other letters: only sizes count.

    What a model draws has other last digits on another processor, most where a page spoils it on
    purpose: 998 of 1,000 pixels are within 8 levels, all within 32. A line that moves differs more.
    """
    drawn, shown, name = Image.open(drawn), Image.open(shown), shown.name
    assert drawn.size == shown.size, name
    if drawn.info.get("Software") == shown.info.get("Software"):
        drawn, shown = (np.asarray(picture.convert("RGB"), int) for picture in (drawn, shown))
        error = abs(drawn - shown).max(axis=-1)
        within(np.quantile(error, 0.998), 8, name)
        within(error.max(), 32, name)


def assert_same_output(printed, shown, where):
    """Words are the same; numbers agree to 1e-3; an error shown as 1e-15 may be 10 times that."""
    message = f"{where} printed\n{printed}where the page shows\n{shown}"
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), message
    for ours, theirs in zip(NUMBER.findall(printed), NUMBER.findall(shown)):
        if "e-" in theirs:
            within(abs(float(ours)), 10 * float(theirs), message)
        else:
            assert_allclose(float(ours), float(theirs), rtol=1e-3, what=message)
