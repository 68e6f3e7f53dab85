"""What every section of the configuration has in common: it is frozen, and refuses unknown names and odd values."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import PydanticCustomError

LARGEST = 2**53  # above it, JSON's numbers are not exact
CREDENTIALS = "an address must not contain credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"


def refuse_credentials(address: str | None) -> str | None:
    """The address itself, which will be in run.json, the report and the workflow.

    Raises:
        PydanticCustomError: it holds a user or a password.
    """
    if "@" in (address or "").partition("://")[2].partition("/")[0]:
        raise PydanticCustomError("credentials", CREDENTIALS)
    return address


class Section(BaseModel):
    """One frozen section; an unknown name is refused, and so is a number that no computer reckons with."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError("a whole number must be at most 2**53")
        return value
