"""The one exception that entry points turn into a sentence and exit code 2."""


class UserError(ValueError):
    """A mistake of the user's: the message names the file, id or flag and says what to do."""


class EveryRankError(UserError):
    """Raised by every rank after the same step, so that one can speak and all can end together."""
