"""The errors a user can meet. All carry one line, and the command line turns them into exit code 2."""


class InputError(ValueError):
    """What was passed in cannot be used. The message is one line: what is wrong, and what is allowed."""


class UnsupportedError(InputError):
    """A network has something that a method cannot read; another method may."""


class SoundnessError(RuntimeError):
    """An attack broke a certified sample: a defect of swiftsure itself, never of the user's input."""
