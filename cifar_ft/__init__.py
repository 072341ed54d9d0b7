"""Fine-tune an ImageNet-pretrained network on CIFAR-10: the library behind the course's notebooks.

Importing the package itself is cheap; each module (`data`, `transforms`, `surgery`, `training`, ...) brings what
it needs.
"""

__version__ = "0.1.0"


class CifarFtError(Exception):
    """Base of every error that a user can mend; its message says what was got, what is allowed and what to do."""
