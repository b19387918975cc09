"""Texts for a student: encoded by its teacher's own text encoder, which its provenance names.

student = Student.from_pretrained("runs/mine")
images = student(student.noise(range(2)), encode_prompts(student, ["a red apple", "a blue apple"]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from advkd.cache.errors import TeacherError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from advkd.stages.student.hub import Student


def encode_prompts(
    student: Student, texts: Sequence[str], teacher: str | None = None, device: torch.device | None = None
) -> Tensor:
    """Prompts as a student is told them.

    Args:
        student: that is told prompts.
        texts: the prompts.
        teacher: folder or Hub id of the teacher; the one that the student's provenance names if None.
        device: where to encode; the CPU if None.

    Returns:
        float32, shape (N, rows, columns), on the CPU.

    Raises:
        UsageError: the student is told no prompts, or where its teacher is isn't known.
        TeacherError: the teacher is missing or another one, or transformers isn't installed.
    """
    import torch

    from advkd.stages.student.facts import section
    from advkd.stages.teacher.config import TeacherConfig
    from advkd.stages.teacher.pipelines.texts import encode_texts

    condition = student.geometry.prompts
    if condition is None:
        what = "classes: use --labels" if student.geometry.num_classes else "nothing: leave out --prompt"
        raise UsageError(f"the student is told {what}")
    known, told = section(student.provenance, "teacher"), section(student.provenance, "prompts")
    origin = {key: value for key, value in known.items() if isinstance(value, str)}
    if teacher is None and "source" not in origin:
        raise UsageError("the student's provenance doesn't name its teacher: give --teacher, a folder or a Hub id")
    try:
        encoded = encode_texts(
            TeacherConfig.recorded(origin, teacher),
            texts,
            condition,
            call=section(told, "call"),
            encoders=section(told, "encoders"),
            precision=str(told.get("precision", "float32")),
            device=device or torch.device("cpu"),
        )
    except TeacherError as error:
        if teacher is not None:
            raise
        raise TeacherError(f"{error}; --teacher says where else it is") from None
    return student.prompts(**encoded)
