"""A small build of the toy teacher, as the tests of stage one plan it."""

import dataclasses
from pathlib import Path

from advkd.stages.teacher.build.plan import Plan, make_plan
from advkd.stages.teacher.config import CacheConfig, SamplerConfig, TeacherConfig

CACHE = CacheConfig(seeds="0:24", record=2, block_size=8, batch_size=5, device="cpu")
SAMPLER = SamplerConfig(steps=4)


def plan_for(folder: Path, store: Path, **changes: object) -> Plan:
    config = dataclasses.replace(CACHE, **changes)  # type: ignore[arg-type]
    return make_plan(TeacherConfig(source=str(folder)), SAMPLER, config, store)
