"""diffusers' network classes by name, imported when first needed: what a store of latents, or a student that is its
teacher's own network, needs of diffusers where there is no teacher. Nothing else of diffusers is imported here.
"""

from __future__ import annotations

from typing import Any


def model_class(name: str) -> Any:
    """A class of `diffusers.models`; whoever asks has checked the name against a list."""
    from diffusers import models, utils

    utils.logging.set_verbosity_error()
    return getattr(models, name)
