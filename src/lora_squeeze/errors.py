"""The one exception class of lora-squeeze."""


class LoraSqueezeError(ValueError):
    """A request or an input that is refused.

    The message is one sentence for a person: what was asked, what was found (name, shape, value), what to do next. The
    command line prints it on one line and exits with code 1.
    """
