"""Models of transformers whose weights stay in their files: `from_pretrained` attaches one, `save_pretrained` writes it out again.

Needs the extra `huggingface`: transformers, and PEFT for adapters.
"""

from tierstore.huggingface.models import from_pretrained
from tierstore.huggingface.saving import save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
