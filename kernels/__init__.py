"""The fused plan operations: public functions, their eager reference and the choice of backend.

`plan_projection` turns planner logits into plans in the LM's space, `plan_projection_from_hidden` does so from the
planner's states, and `add_plan` adds each token's plan to its LM state; `StackedPlan` does that layer by layer.
`packed_attention` and `cross_entropy_` are what the LM around them spends its time on besides matrix products.
Imports torch only; a backend's own dependencies are imported when it is first used.
"""

# transformers looks for a package called `kernels` and, where the project's root is on the path, imports this folder
# under that name. It gets an empty module: a second copy would register every operation twice.
if __name__ == "planlm.kernels":
    from .addition import StackedPlan, add_plan
    from .backend import use_backend
    from .lm import (
        Documents,
        cross_entropy_,
        has_packed_attention,
        packed_attention,
        say_masked,
        varlen_attention,
        varlen_documents,
    )
    from .projection import plan_projection, plan_projection_from_hidden
    from .reference import PlanProjection

    __all__ = [
        "Documents",
        "PlanProjection",
        "StackedPlan",
        "add_plan",
        "cross_entropy_",
        "has_packed_attention",
        "packed_attention",
        "plan_projection",
        "plan_projection_from_hidden",
        "say_masked",
        "use_backend",
        "varlen_attention",
        "varlen_documents",
    ]
