"""What all values have in common: they are frozen, and their texts can be stored anywhere."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Frozen(BaseModel):
    # A wrong value may be a secret: pydantic's own text must not repeat it.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def is_clean(text: str) -> bool:
    """Whether an Engine and a database can take it: no NUL, no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _clean_text(value: str) -> str:
    if not is_clean(value):
        raise ValueError("must not contain a NUL character, and be valid Unicode without lone surrogates")
    return value


Text = Annotated[str, AfterValidator(_clean_text)]
