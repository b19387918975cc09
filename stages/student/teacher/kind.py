"""The student that is its teacher's network, as the registry of kinds has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advkd.cache.errors import UsageError
from advkd.stages.student.unrolled.config import UnrolledOptions
from advkd.stages.student.unrolled.kind import Unrolled

if TYPE_CHECKING:
    from advkd.stages.student.geometry import Geometry
    from advkd.stages.student.training.protocol import StudentNetwork


class Teacher(Unrolled):
    """The teacher's network, unrolled over a few states and trained as the unrolled student is."""

    starts_from_teacher = True

    def build(self, options: UnrolledOptions, geometry: Geometry) -> StudentNetwork:
        """A network with fresh weights; training starts from the teacher's instead.

        Raises:
            UsageError: the teacher is a text-to-image pipeline.
        """
        if geometry.prompts is not None:
            raise UsageError(
                "student.kind: teacher is not made for a text-to-image pipeline's network, which made this cache: use "
                "unrolled"
            )
        from advkd.stages.student.teacher.network import TeacherStudent

        return TeacherStudent(geometry, options.shared)
