"""For lm-evaluation-harness only, so that it loads ifeval.yaml; the evaluator here has its own checker."""

from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results  # noqa: F401
