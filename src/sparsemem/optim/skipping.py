"""Count steps that were skipped because loss or gradient is not finite; stop after many in a row."""

import logging

logger = logging.getLogger(__name__)

# Training stops after this many skipped steps in a row.
MOST_SKIPPED = 10


class SkippedSteps:
    """Attributes:
    total: how many steps were skipped.
    in_a_row: how many of the last steps; 0 if the last step was made.
    """

    def __init__(self) -> None:
        self.total = self.in_a_row = 0

    def add(self, skipped: bool) -> None:
        """Count one step.

        Raises:
            ValueError: it is the MOST_SKIPPED-th skipped step in a row.
        """
        if not skipped:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        logger.warning(
            "step skipped: the loss or a gradient is NaN or infinite (%d in a row, %d in all)",
            self.in_a_row,
            self.total,
        )
        if self.in_a_row == MOST_SKIPPED:
            raise ValueError(
                f"the loss is NaN or infinite in {MOST_SKIPPED} steps in a row; choose a smaller lr or check "
                "the data, and continue from the last checkpoint, which is from before these steps"
            )
