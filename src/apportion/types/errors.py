"""Every error a user can cause.

    ApportionError
    ├── UsageError          exit code 2: what was typed, or a file that was named, cannot be used
    │   ├── ModelError      a model folder, config or checkpoint
    │   ├── ClusterError    a device or link description
    │   └── PlanError       a plan file, or a plan for another model
    ├── InfeasibleError     exit code 3: the devices cannot hold what was asked
    ├── EngineError         exit code 4: a worker failed or vanished while running
    └── QueueFullError      too many requests are open; one that ends makes room

Each message is one line, with the numbers and what to change.
"""


class ApportionError(Exception):
    exit_code = 1


class UsageError(ApportionError):
    exit_code = 2


class ModelError(UsageError):
    pass


class ClusterError(UsageError):
    pass


class PlanError(UsageError):
    pass


class InfeasibleError(ApportionError):
    exit_code = 3


class EngineError(ApportionError):
    exit_code = 4


class QueueFullError(ApportionError):
    pass
