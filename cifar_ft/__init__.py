"""Fine-tune an ImageNet-pretrained network on CIFAR-10: the library behind the course's notebooks.

One room a chapter: `data`, `transforms`, `models`, `training`, `results`, `predictions`, `widget`; `course` runs all.
Each is a package that hands on its public names. Importing `cifar_ft` itself is cheap; each room brings what it needs.
"""

import contextlib
import logging
import sys

__version__ = "0.1.0"


class CifarFtError(Exception):
    """Base of every error that a user can mend; its message says what was got, what is allowed and what to do."""

    wrong_argument = False  # True: the command line ends with status 2 instead of 1


class _Lines(logging.Handler):
    """Print each message as a line on what is standard output at the moment: notebooks and tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # no output, or one that cannot show a character, must not end the work
            print(self.format(record), file=sys.stdout, flush=True)


# What the library has to say. To hear less: logging.getLogger("cifar_ft").setLevel("WARNING").
log = logging.getLogger("cifar_ft")
if not log.handlers:
    log.addHandler(_Lines())
    log.setLevel(log.level or logging.INFO)
    log.propagate = False  # a root logger with a handler of its own, as on Colab, would say everything twice
