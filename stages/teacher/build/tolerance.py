"""How far another machine's states may differ from this one's: measured once per store, when it is created.

Another machine adds up the same numbers in another order, so each prediction of the network differs in its last
digits, and the trajectory carries that on. The measurement imitates this: a few seeds are sampled twice in one batch,
the second time with a random relative error in every prediction, well above such differences. The tolerance is the root
mean square difference of the recorded states, times a margin.
"""

from __future__ import annotations

import numpy as np

from advkd.cache.files.durable import write_atomically
from advkd.cache.files.sealed_json import seal
from advkd.cache.read.compare import MAX_TOLERANCE, TOLERANCE_FILE, distance
from advkd.stages.teacher.build.plan import Plan
from advkd.stages.teacher.build.recorder import Recorder
from advkd.stages.teacher.sample.disturbed import Disturbance
from advkd.stages.teacher.sample.sampling import initial_noise

NUM_SEEDS = 4
MARGIN = 4.0
RELATIVE_ERROR = {"float32": 5e-5, "float16": 1e-2, "bfloat16": 8e-2}
"""Of a prediction, root mean square, by compute precision: about 30 times the difference between two machines.

Measured on the digits teacher, a CPU with AVX-512 and oneDNN against one without either: predictions differ by 1e-6,
4e-4 and 3e-3. Most seeds carry that on as it is, but one in a thousand multiplies it by thirty, which four seeds don't
show. With these numbers the tolerance of x_0 is 2 to 13 times the largest difference among 2,048 seeds.
"""


def measure_tolerance(plan: Plan) -> dict[int, float]:
    """Root mean square per seed by which another machine's states may differ, by solver steps done, in stored units."""
    seeds = list(plan.seeds[:NUM_SEEDS]) * 2
    noise = initial_noise(plan.recipe.root_seed, seeds, plan.recipe.item_shape, plan.layout.dtype)
    kept = Recorder(plan, seeds, Disturbance(RELATIVE_ERROR[plan.config.precision]))(noise, seeds)
    half = len(seeds) // 2
    apart = {step: MARGIN * distance(values.numpy()[:half], values.numpy()[half:]) for step, values in kept.items()}
    return {step: min(value, MAX_TOLERANCE) for step, value in apart.items()}


def record_tolerance(plan: Plan) -> None:
    """Measure the tolerance unless the store has one."""
    path = plan.store / TOLERANCE_FILE
    if path.is_file():
        return
    measured = {f"{step:04d}": float(np.format_float_scientific(value, 2)) for step, value in
                measure_tolerance(plan).items()}  # fmt: skip
    value = {
        "rms": measured,
        "margin": MARGIN,
        "relative_error": RELATIVE_ERROR[plan.config.precision],
        "num_seeds": min(NUM_SEEDS, len(plan.seeds)),
    }
    write_atomically(path, [seal(value)])
