"""Faults of several files, collected so that one run names them all."""

# Enough to see what is wrong; a screen whose every file is wrong is not read to its end.
MOST = 30


class Faults(ValueError):
    """What is wrong with some files: `messages`, a text for each. A task that raises it stops no other task."""

    def __init__(self, messages):
        super().__init__(list(messages))

    @property
    def messages(self):
        return self.args[0]

    def __str__(self):
        if len(self.messages) == 1:
            return self.messages[0]
        more = " or more; the rest was not looked at" if len(self.messages) >= MOST else ""
        return "\n  ".join([f"{len(self.messages)} files are not as expected{more}:", *self.messages])


def collect_faults(function, items):
    """Gives `function(item)` of each item, and raises the errors of them together, as `Faults`, at the end: those of
    contents (ValueError) and those of files that cannot be read (OSError).

    After the first no result is given any more; after `MOST` nothing more is tried.
    """
    messages = []
    for item in items:
        try:
            result = function(item)
        except (ValueError, OSError) as error:
            messages += error.messages if isinstance(error, Faults) else [describe_fault(error)]
            if len(messages) >= MOST:
                break
        else:
            if not messages:
                yield result
    if messages:
        raise Faults(messages[:MOST])


def describe_fault(error):
    """The text of an error, with the file that could not be read."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: cannot be read ({error.strerror})."
    return str(error)
