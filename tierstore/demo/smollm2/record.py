"""What a fine-tuning run has to tell, kept in the commit's metadata: it survives the process, and the report needs nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tierstore.demo.record import Ledger, read_fields
from tierstore.demo.smollm2.recipe import Recipe

FORMAT = "smollm2-1"


@dataclass(slots=True)
class Record(Ledger):
    """One run, from its first process to its last.

    Attributes:
        corpus: Digest of the text.
        first_answer: What the model made of the prompt before it learnt anything.
        last_answer: And at the end; None until then.
    """

    recipe: Recipe
    corpus: str
    first_answer: str = ""
    last_answer: str | None = None

    @property
    def finished(self) -> bool:
        return self.last_answer is not None

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It was written by something else, or by a demo of another format.
        """
        try:
            fields = read_fields(data, FORMAT)
            return cls(**fields | {"recipe": Recipe(**fields["recipe"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the record of the run lacks something: {error}") from error
