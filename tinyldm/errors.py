"""The one exception users meet: bad input, said in one line."""


class TinyldmError(ValueError):
    """What was expected, what came, what to do next. The command line exits with status 2."""
