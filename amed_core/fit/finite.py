"""What is not finite ends a fit where it would be learned from; what is measured so counts as infinitely bad."""

from torch import Tensor


def finite(values: Tensor, what: str) -> Tensor:
    """The same values, if they are finite. Raises FloatingPointError, saying what they are, if they are not."""
    if not bool(values.isfinite().all()):
        raise FloatingPointError(
            f"{what} are not finite. Check the model's precision (try --force-fp32 or another weight dtype) and its "
            "LoRAs."
        )
    return values
