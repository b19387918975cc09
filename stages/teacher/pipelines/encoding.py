"""Prompts as a pipeline's own encoders see them: each encoded once and alone, its tensors named as the call does.

What `encode_prompt` returns differs between pipelines, but its source names the tensors as the arguments of the call:
`return prompt_embeds, negative_prompt_embeds, …`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from advkd.cache.errors import TeacherError, first_line
from advkd.cache.format.prompts import TEXT_PATH, Embedding, Prompt

NEGATIVE = "negative_"
_STORED = {
    torch.float32: "float32",
    torch.bfloat16: "float32",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int32: "int64",
    torch.bool: "bool",
}
"""dtype of a tensor → of its array, which has the same values."""
Encoded = dict[str, Tensor]
"""By argument of the call, without the axis of the batch."""


def encode(pipe: Any, prompt: Prompt, options: Mapping[str, Any], device: torch.device) -> Encoded:
    """One prompt's tensors, those of its negative prompt included.

    Args:
        pipe: the pipeline.
        prompt: the texts.
        options: further arguments, of which those that `encode_prompt` knows are passed on.
        device: where the encoders compute.

    Raises:
        TeacherError: the pipeline has no encoders, or gives something else than tensors.
    """
    known, call = inspect.signature(pipe.encode_prompt).parameters, inspect.signature(pipe.__call__).parameters
    found = _named(pipe, {"negative_prompt": prompt.negative, "do_classifier_free_guidance": True}, prompt, options)
    own_scale = call["true_cfg_scale"].default if "true_cfg_scale" in call else 1.0
    guided = bool(prompt.negative) or float(options.get("true_cfg_scale", own_scale)) > 1.0
    if "negative_prompt" not in known and f"{NEGATIVE}prompt_embeds" in call and guided:
        negative = _named(pipe, {}, Prompt(text=prompt.negative or " "), options)
        found |= {f"{NEGATIVE}{name}": value for name, value in negative.items()}
    encoded = {}
    for name, value in found.items():
        if name not in call or value is None:
            continue
        tensor = value[0] if isinstance(value, list | Tensor) and len(value) == 1 else None
        if not isinstance(tensor, Tensor) or tensor.dtype not in _STORED:
            raise TeacherError(f"{type(pipe).__name__}.encode_prompt gives no tensor of one prompt as {name}")
        encoded[name] = tensor.to(device)
    return encoded


def takes_lists(pipe: Any, name: str) -> bool:
    """Whether a pipeline's call takes an embedding as a list of tensors of different lengths, as Z-Image's does."""
    return "list" in str(inspect.signature(pipe.__call__).parameters[name].annotation)


def _named(pipe: Any, more: Mapping[str, Any], prompt: Prompt, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `encode_prompt` returns, by name."""
    known = inspect.signature(pipe.encode_prompt).parameters
    given: dict[str, Any] = {"prompt": prompt.text, "num_images_per_prompt": 1, "device": pipe._execution_device}
    given |= {"prompt_2": None, "prompt_3": None, **more, **options}
    try:
        with torch.inference_mode():
            values = pipe.encode_prompt(**{name: value for name, value in given.items() if name in known})
    except Exception as error:  # a pipeline without encoders, or whatever foreign tokenizers raise
        raise TeacherError(
            f"a {type(pipe).__name__} can't encode {prompt.text[:40]!r} ({first_line(error)})"
        ) from error
    names = _returned(pipe)
    if not isinstance(values, tuple) or len(values) != len(names):
        raise TeacherError(f"{type(pipe).__name__}.encode_prompt returns something else than {', '.join(names)}")
    return dict(zip(names, values, strict=True))


def _returned(pipe: Any) -> list[str]:
    """The names of what `encode_prompt` returns, from its source."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(pipe).encode_prompt)))
    returns = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)]
    last = returns[-1] if returns else None
    names = [part.id for part in getattr(last, "elts", []) if isinstance(part, ast.Name)]
    if not names or len(names) != len(getattr(last, "elts", [])):
        raise TeacherError(f"{type(pipe).__name__}.encode_prompt doesn't say by name what it returns")
    return names


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts:
    """Some prompts with their tensors."""

    prompts: tuple[Prompt, ...]
    encoded: tuple[Encoded, ...]

    def groups(self, pipe: Any, rows: Sequence[int]) -> list[list[int]]:
        """Which places of a batch can be made by one call: those whose prompts have as many tokens, or all where the
        call takes lists."""
        places: dict[tuple[torch.Size, ...], list[int]] = {}
        for place, row in enumerate(rows):
            tensors = self.encoded[row].items()
            shapes = tuple(tensor.shape for name, tensor in tensors if not takes_lists(pipe, name))
            places.setdefault(shapes, []).append(place)
        return list(places.values())

    def arguments(self, pipe: Any, rows: Sequence[int]) -> dict[str, Any]:
        """The embeddings as arguments of a pipeline's call.

        Args:
            pipe: the pipeline.
            rows: which of the prompts each image of the batch has.

        """
        arguments: dict[str, Any] = {}
        for name in self.encoded[0]:
            tensors = [self.encoded[row][name] for row in rows]
            arguments[name] = tensors if takes_lists(pipe, name) else torch.stack(tensors)
        return arguments

    def arrays(self, embeddings: Sequence[Embedding]) -> dict[str, npt.NDArray[Any]]:
        """What a store keeps of them, by array path; a row per prompt.

        Raises:
            TeacherError: a prompt's tensors have another shape than the recipe's.
        """
        found: dict[str, npt.NDArray[Any]] = {TEXT_PATH: np.stack([prompt.to_row() for prompt in self.prompts])}
        for one in embeddings:
            values = np.zeros((len(self.prompts), *one.shape), dtype=one.dtype)
            lengths = np.zeros(len(self.prompts), dtype=np.int64)
            for row, (prompt, encoded) in enumerate(zip(self.prompts, self.encoded, strict=True)):
                tensor = encoded[one.name]
                lengths[row] = tensor.shape[0]
                fits = tensor.shape[1:] == one.shape[1:] and lengths[row] <= one.shape[0]
                if not fits or (not one.padded and lengths[row] != one.shape[0]):
                    raise TeacherError(
                        f"prompt {prompt.text[:40]!r}: its {one.name} has the shape {list(tensor.shape)}, that of the "
                        f"others {list(one.shape)}; expected a pipeline that pads its prompts to one length"
                    )
                plain = tensor.float() if tensor.is_floating_point() else tensor  # NumPy has no bfloat16
                values[row, : lengths[row]] = plain.cpu().numpy()
            found[one.path] = values
            if one.padded:
                found[one.length_path] = lengths
        return found


def embeddings_of(encoded: Encoded, others: Sequence[Encoded], longest: int) -> tuple[Embedding, ...]:
    """What a store keeps of prompts, as some of them show it: all but what guidance leads away from, which only the
    teacher needs.

    Args:
        encoded: of a prompt.
        others: of a shorter and of a longer one; where tensors differ in length, prompts are stored padded.
        longest: tokens for which padded embeddings have room.
    """
    found = []
    for name, tensor in encoded.items():
        if name.startswith(NEGATIVE):
            continue
        padded, shape = any(other[name].shape != tensor.shape for other in others), tuple(tensor.shape)
        shape = (max(longest, shape[0]), *shape[1:]) if padded else shape
        found.append(Embedding(name=name, shape=shape, dtype=_STORED[tensor.dtype], padded=padded))
    return tuple(found)
