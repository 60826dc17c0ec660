"""What the user of `ofp-check` can put right."""

from ...errors import UserError


class CheckError(UserError):
    """A dataset, a setting or a file that does not fit the check."""
